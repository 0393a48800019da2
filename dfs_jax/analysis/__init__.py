"""What a network costs and how good its exits are: counts, reports and plots."""
