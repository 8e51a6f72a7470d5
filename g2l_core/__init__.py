"""G2L's library: from slides to stored features to a distilled student to figures.

The modules, lowest first; each imports only from the lines above its own::

    errors                                                       what can go wrong
    types                                                        units, ids, array aliases
    slides manifest grid views encoders engine losses metrics store
    tissue loader
    training tasks
    report
    synthetic                                                    draws small slides for demos and tests

Importing this package imports none of them.
"""

__version__ = "0.1.0"
