"""The pages of the app: server-rendered, every asset local."""
