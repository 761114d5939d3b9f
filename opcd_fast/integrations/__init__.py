"""Other people's trainers: one module per trainer, each needs that trainer installed. Importing this imports none."""
