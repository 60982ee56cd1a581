"""Rules that training and evaluation share."""
