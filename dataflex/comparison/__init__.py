"""`compare`: arms that train on different rows, from one start and with one budget, measured on held-out rows."""
