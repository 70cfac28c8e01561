"""Learning problems: where data come from, who owns them, and which model learns them."""
