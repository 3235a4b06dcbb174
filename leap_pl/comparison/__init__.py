"""Comparison of results, as run by ``leap_pl compare``: entries, differences, table, plots and HTML page."""
