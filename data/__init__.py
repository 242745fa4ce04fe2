"""Making and reading data: sounds, scenes, questions, the TFDS builder and the grain pipelines."""
