"""Linear maps from the flat parameter vector (P numbers) to k, applied tensor by tensor as gradients appear.

Every random number is an integer hash of a seed and an index. No generator is involved, so a map is the same on every
device, at every batch size and thread count, and no matrix is ever stored.

To add a projector: a file with a class that extends `NamedProjector` (protocol.py), and a line in table.py.
"""
