// From the tables of all running requests to the tensors of one step.
#include "../_cpu/simd.h"

namespace millrace {
namespace {

/// The arguments, as in op.py. Strides are in numbers, from row to row.
struct Call : Header {
    const int *token_table, *block_table, *plan;
    int64_t *token_ids, *positions, *slots;
    int *query_start_loc, *seq_lens, *block_tables;
    long token_stride, table_stride, plan_stride;
    int num_seqs;  // -1: as many as there are rows
    int max_blocks, block_size;
};

void gather(const Call& c) {
    const int num_seqs = c.num_seqs < 0 ? int(c.num_rows) : c.num_seqs;
    for (int seq = 0; seq < num_seqs; seq++) {
        const int row = c.plan[seq], start = c.plan[c.plan_stride + seq], count = c.plan[2 * c.plan_stride + seq];
        const int offset = c.plan[3 * c.plan_stride + seq];
        const int *tokens = c.token_table + row * c.token_stride, *blocks = c.block_table + row * c.table_stride;
        for (int i = 0; i < count; i++) {
            const int position = start + i;
            c.positions[offset + i] = position;
            c.token_ids[offset + i] = row < 0 ? 0 : tokens[position];
            c.slots[offset + i] =
                row < 0 ? -1 : int64_t(blocks[position / c.block_size]) * c.block_size + position % c.block_size;
        }
        c.query_start_loc[seq] = offset;
        c.seq_lens[seq] = row < 0 ? 0 : start + count;
        int* to = c.block_tables + long(seq) * c.max_blocks;
        if (row < 0) std::fill(to, to + c.max_blocks, 0);
        else std::copy(blocks, blocks + c.max_blocks, to);
    }
    c.query_start_loc[num_seqs] = int(c.num_rows);
}

}  // namespace
}  // namespace millrace

extern "C" void gather_batch(const void* call) { millrace::gather(*static_cast<const millrace::Call*>(call)); }
