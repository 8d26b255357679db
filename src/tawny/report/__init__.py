"""What a person reads: model cards, HTML pages and pictures, made from records; and the upload to the hub."""
