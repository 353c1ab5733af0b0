"""What the HTML pages of all rooms share: the style sheet, axes, how numbers are written."""
