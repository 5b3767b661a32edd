"""A model behind the OpenAI protocol: transformers' own chat handler, a budget for each request, and limits."""
