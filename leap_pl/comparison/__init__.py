"""What ``leap_pl compare`` is made of: what is compared, its table, its pictures and its page."""
