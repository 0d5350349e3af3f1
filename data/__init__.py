"""Get, make and check the token shards that train_gpt.py reads: `python -m data.prepare VERB`."""
