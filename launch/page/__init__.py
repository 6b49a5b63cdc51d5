"""The report as one page of HTML: figures that can be hovered, tables, the lineage of tickets."""
