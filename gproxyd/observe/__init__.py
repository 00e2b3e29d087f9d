"""What is told to the operator.

journal   log lines, written off the loop
"""
