"""A1111, Forge and ComfyUI-Manager run this file after a clone. It changes nothing.

Tenuto needs only what its hosts already have: there is nothing to install into their environment.
"""
