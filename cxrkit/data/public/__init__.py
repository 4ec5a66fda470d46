"""One module per public source: from the folder as downloaded to a Dataset."""
