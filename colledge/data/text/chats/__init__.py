"""Chats to text by the tokenizer's own template, and what of it is whose."""
