"""The demonstration models that ship with Tenuto, and the recipe that trains them."""
