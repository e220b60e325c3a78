"""Feature cards: what a latent is active on, and beside it what a random direction looks like."""
