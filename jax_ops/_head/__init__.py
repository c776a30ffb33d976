"""The linear layer and its loss, by chunks: no array of all logits."""
