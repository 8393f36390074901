"""Text from a model.

state: what is kept of a text that was read, a value of fixed size.   prompt: from a prompt to it.
tokens: between text and token ids.   sampling: from logits to a token.   writer: from tokens to
text, whole characters only.   request: the arguments of a call, checked.   generate: all of it
together, at once or as a stream.
"""
