"""Small trained pipelines, the pictures they learn from and the program that checks them."""
