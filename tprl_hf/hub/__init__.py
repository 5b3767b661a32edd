"""To the Hub: a checkpoint or demonstrations with their card, and the records of the training behind them."""
