"""Publishing on the Hub: the files of a push, the model card, the Trainer that pushes."""
