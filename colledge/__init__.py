"""colledge: a pool of unequal devices trains one big model for the least energy within a deadline."""

__version__ = "0.1.0"
