"""Tables, plots and cards."""
