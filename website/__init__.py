"""Between the suite and the reader: runs the history, tables of the results, published pages."""
