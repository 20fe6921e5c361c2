"""The DLO adapter: injected layers and routers, apart from the model they go on."""
