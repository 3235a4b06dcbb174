"""Run what the repository measures and shows; none of it is in the wheel."""
