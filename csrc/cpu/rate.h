// The work of a benchmark: products of a tile as the sweep does them, on the calling thread.
// Included inside the namespace of an instruction set; never on its own.

// Repeats the product of 96 x 512 with 512 x 128 numbers; returns the floating-point operations of one.
inline int64_t multiply_repeatedly(int64_t pieces, int64_t repeats) {
  constexpr int64_t M = 96, N = 128, K = 512;
  const auto c = make_lines<float>(M * N);
  const int64_t numbers = (M + N) * K * std::max<int64_t>(pieces, 2);  // a float takes two
  const auto operands = make_lines<uint16_t>(numbers);
  std::fill_n(operands.get(), numbers, uint16_t(0x3f00));
#if FM_TILES > 0
  if (pieces) {
    const Tiles a{operands.get(), pieces, K / kTileStep}, b = a.from(M / kTileSide, 0);
    const TileUnit unit(true);
    for (int64_t i = 0; i < repeats; i++)
      multiply_tiles(M, N, K, a, b, c.get(), M, false, [](int64_t, int64_t, float*) {}, [] {});
    return 2 * M * N * K;
  }
#endif
  const float* a = reinterpret_cast<const float*>(operands.get());
  for (int64_t i = 0; i < repeats; i++) multiply_panels(M, N, K, a, a + M * K, c.get(), M, [] {});
  return 2 * M * N * K;
}
