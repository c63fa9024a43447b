"""A drafter's repository, its card, and how it gets to the Hub."""
