"""What a person runs: the commands, and the Python interface behind them."""
