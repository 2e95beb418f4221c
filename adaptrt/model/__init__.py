"""Architectures as declarative descriptions: config → hyper-parameters, tensor names, Program."""
