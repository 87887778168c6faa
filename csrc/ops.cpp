// Every operator's schema, once. The kernels are registered by the files in cpu/ and cuda/. Those for both devices
// write into tensors that the caller made: so the dispatcher finds the device, and a chunk's memory can be reused; what
// they refuse is in checks.h. Those on index sets and graphs, blocks and tangents are there for the CPU alone; they
// return new tensors, and say in their own file what they refuse.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(torchzygote, m) {
  m.def("seed_rows_(Tensor(a!) out, int lo, Tensor? colors) -> ()");
  m.def("scatter_rows_(Tensor(a!)[] blocks, Tensor[] products, int lo) -> ()");
  m.def("gather_diagonal_(Tensor(a!) out, Tensor products, int lo, Tensor? colors) -> ()");
  m.def("decompress_(Tensor(a!) out, Tensor products, int lo, Tensor slot_row, Tensor slot_column) -> ()");
  m.def(
      "decompress_dense_(Tensor(a!) out, Tensor products, int lo, Tensor slot_row, Tensor slot_column, "
      "Tensor rows, Tensor columns) -> ()");
  m.def("compress_(Tensor(a!) out, Tensor row_ptr, Tensor columns, Tensor values, Tensor colors) -> ()");
  m.def(
      "unite_sets(Tensor set_ptr, Tensor set_members, Tensor group_ptr, Tensor group_ids, int most) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "unite_pairs(Tensor set_ptr, Tensor set_members, Tensor first, Tensor second, int most) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "expand_pairs(Tensor set_ptr, Tensor set_members, Tensor first, Tensor second, Tensor bounds, int most) "
      "-> (Tensor, Tensor)");
  m.def(
      "mirrored_blocks(Tensor[] products, Tensor shifts, Tensor scales, int[] widths, float slack) "
      "-> (Tensor[], Tensor)");
  m.def(
      "push_elementwise_(Tensor(a!) tangents, Tensor slope, Tensor weight, bool squared, str function) -> Tensor");
  m.def("color_graph(Tensor indptr, Tensor indices, int ncols, str kind, str order) -> Tensor");
}
