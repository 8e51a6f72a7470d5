"""G2L's library: from slides to stored features to a distilled student to metric values.

Its packages are rooms on floors. Each imports only from floors below its own:

    extraction  distillation  benchmark  datasets
    patches  tissue  encoders
    slides  store  metrics  report  synthetic
    errors  types  options  results  rng  concurrency  files

docs/architecture.md follows one patch through them. Importing this package imports none of them.
"""

__version__ = "0.2.0.dev0"
