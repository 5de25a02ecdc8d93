"""The Triton backend: any cell as a pair of Triton functions, run by the schedules of this package.

Importing this module does not import Triton, nor does ``definition``, which registers the ops; ``ops`` does.
"""
