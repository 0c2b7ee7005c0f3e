// Runs recorded calls of kernels, one after the other, with another number of rows than they were recorded with.
#include "header.h"

namespace millrace {
namespace {

struct Entry {
    void (*kernel)(const void*);
    Header* call;
};

}  // namespace
}  // namespace millrace

extern "C" void run_tape(const millrace::Entry* entries, int num_entries, long num_rows, int num_threads) {
    for (int i = 0; i < num_entries; i++) {
        entries[i].call->num_rows = num_rows;
        entries[i].call->num_threads = num_threads;
        entries[i].kernel(entries[i].call);
    }
}
