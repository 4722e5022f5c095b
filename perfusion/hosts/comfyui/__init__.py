"""ComfyUI as a host: the only package that knows its internals.

``structure`` reads what a model is made of, ``apply`` puts concepts on a MODEL and a CLIP, ``text`` teaches words and
encodes prompts, ``training`` makes a model trainable inside the executor, ``memory`` tells what that takes
before it is done, ``library`` finds and keeps concept files.
"""
