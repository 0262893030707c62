"""torch's CSR product and sampled product (MKL), joined by hand: its autograd has no gradient for packed values."""

SPARSE = True


def prepare(data, threads):
    import torch
    from torch import nn

    from benchmarks.training_mlp import network
    from benchmarks.training_mlp.solvers._step import prepared

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x_TK, values, layer):
            w = layer.matrix(values)
            ctx.save_for_backward(x_TK, values)
            ctx.layer = layer
            return torch.mm(w, x_TK.t()).t()

        @staticmethod
        def backward(ctx, dy_TM):
            x_TK, values = ctx.saved_tensors
            layer, dx, dvalues = ctx.layer, None, None
            if ctx.needs_input_grad[0]:
                dx = torch.mm(layer.transposed(values), dy_TM.t()).t()
            if ctx.needs_input_grad[1]:
                zero = layer.matrix(torch.zeros_like(values))
                dvalues = torch.sparse.sampled_addmm(zero, dy_TM.t().contiguous(), x_TK.contiguous()).values()
            return dx, dvalues, None

    class Layer(nn.Module):
        def __init__(self, dense, mask):
            super().__init__()
            w = mask.float().to_sparse_csr()
            self.shape, self.values = tuple(mask.shape), nn.Parameter(dense.weight.detach()[mask])
            self.bias = nn.Parameter(dense.bias.detach().clone())
            self.register_buffer("crow", w.crow_indices().int())
            self.register_buffer("col", w.col_indices().int())
            rows = torch.repeat_interleave(torch.arange(self.shape[0]), w.crow_indices().diff())
            order = w.col_indices().argsort(stable=True)
            self.register_buffer("order", order.int())
            counts = torch.bincount(w.col_indices(), minlength=self.shape[1])
            self.register_buffer("t_crow", torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
            self.register_buffer("t_col", rows[order].int())

        def matrix(self, values):
            return torch.sparse_csr_tensor(self.crow, self.col, values, self.shape, check_invariants=False)

        def transposed(self, values):
            packed = values.index_select(0, self.order)
            return torch.sparse_csr_tensor(self.t_crow, self.t_col, packed, self.shape[::-1], check_invariants=False)

        def forward(self, x):
            return Product.apply(x, self.values, self) + self.bias

    def build(data):
        sparse = [Layer(layer, mask) for layer, mask in zip(data.layers, data.masks)]
        return network.chain(*sparse, data.layers[2])

    return prepared(data, threads, build)
