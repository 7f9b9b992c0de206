"""The gradient store, one HDF5 file: how rows are kept (layout.py), what they came from (manifest.py), reader.py and
writer.py.

A row whose direction is all zero or not finite has no unit vector. Where such rows are skipped, they are done, with
norm 0 and zeros for a vector: `GradientStore.bad`. Nothing scores or selects them.
"""
