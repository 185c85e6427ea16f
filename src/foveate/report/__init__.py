"""What a person sees: tables for the terminal and the picture of quality against speed."""
