"""Text from a model.

state: what is kept of a text that was read, a value of fixed size.   prompt: from a prompt to it.
sampling: from logits to a token.   writer: from tokens to text, whole characters only.
generate: all of it together, a text at once or as it grows.
"""
