"""A vision-language model as judge (GPT-4.1 or any OpenAI-compatible endpoint)."""
