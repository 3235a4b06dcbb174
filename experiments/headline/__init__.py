"""``make results``: the headline experiment, cell by cell, with the commands of leap_pl, and its report."""
