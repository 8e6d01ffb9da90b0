"""Data and metrics to train and judge students on."""
