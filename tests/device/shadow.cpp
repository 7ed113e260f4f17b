// A CUDA device made of CPU memory: what is registered with PyTorch. See README.md for what it shows and what it cannot.
//
// Every operation on it is the CPU's kernel on the same memory, so values are real and autograd and autocast work as
// they are. What a GPU refuses is refused (tensors of two devices, a generator of another, a host's wait within a
// captured graph), and what costs time there is counted (launches, waits, copies, allocations).
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>

using namespace at;

namespace {

// ---------------------------------------------------------------------------------------------------- devices

const DeviceIndex devices = [] {
  const char* said = std::getenv("SHADOW_N");
  return static_cast<DeviceIndex>(said ? std::atoi(said) : 1);
}();
thread_local DeviceIndex current = 0;

Device on(DeviceIndex index) { return Device(kCUDA, index < 0 ? current : index); }
bool is_here(const Tensor& t) { return t.defined() && t.device().type() == kCUDA; }

DeviceIndex exchange(DeviceIndex index) {
  TORCH_CHECK(index < devices, "CUDA error: invalid device ordinal");
  DeviceIndex before = current;
  if (index >= 0) current = index;
  return before;
}

struct Within {
  explicit Within(DeviceIndex index) : before(exchange(index)) {}
  ~Within() { current = before; }
  DeviceIndex before;
};

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return kCUDA; }
  Device exchangeDevice(Device d) const override { return on(exchange(d.index())); }
  Device getDevice() const override { return on(current); }
  void setDevice(Device d) const override { exchange(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index() < 0 ? current : d.index(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, on(d.index())); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return getStream(s.device()); }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// ---------------------------------------------------------------------------------------------------- memory

// What PyTorch's caching allocator would keep of the card: which pieces fit into what was freed before, and when it must
// ask the card for more. Its rules and sizes (c10/cuda/CUDACachingAllocator.cpp), without streams.
class Cache {
 public:
  struct Block { int64_t size; bool large, used; Block *before, *after; };
  int64_t reserved = 0, peak = 0, asked = 0;

  Block* take(int64_t bytes) {
    int64_t size = std::max<int64_t>(kRound, round(bytes, kRound));
    bool large = size > kSmall;
    auto found = idle[large].lower_bound({size, nullptr});
    Block* block = found == idle[large].end() ? from_card(size, large) : found->second;
    if (found != idle[large].end()) idle[large].erase(found);
    int64_t rest = block->size - size;
    if (large ? rest > kSmall : rest >= kRound) {
      auto* tail = new Block{rest, large, false, block, block->after};
      if (tail->after) tail->after->before = tail;
      block->after = tail;
      block->size = size;
      idle[large].insert({rest, tail});
    }
    block->used = true;
    return block;
  }

  void give_back(Block* block) {
    block->used = false;
    for (Block* other : {block->before, block->after}) {
      if (!other || other->used) continue;
      idle[block->large].erase({other->size, other});
      Block *first = other == block->before ? other : block, *second = first->after;
      first->size += second->size;
      first->after = second->after;
      if (second->after) second->after->before = first;
      delete second;
      block = first;
    }
    idle[block->large].insert({block->size, block});
  }

  void empty() {
    for (auto& pool : idle)
      for (auto it = pool.begin(); it != pool.end();) {
        Block* block = it->second;
        if (block->before || block->after) { ++it; continue; }
        reserved -= block->size;
        delete block;
        it = pool.erase(it);
      }
  }

 private:
  static constexpr int64_t kRound = 512, kSmall = 1 << 20, kPiece = 2 << 20, kLargePiece = 20 << 20, kLarge = 10 << 20;
  std::set<std::pair<int64_t, Block*>> idle[2];

  static int64_t round(int64_t size, int64_t to) { return (size + to - 1) / to * to; }
  Block* from_card(int64_t size, bool large) {
    int64_t piece = !large ? kPiece : size < kLarge ? kLargePiece : round(size, kPiece);
    reserved += piece;
    peak = std::max(peak, reserved);
    asked++;
    return new Block{piece, large, false, nullptr, nullptr};
  }
};

struct Memory { int64_t live = 0, peak = 0, allocations = 0; Cache cache; };
// Never destroyed: tensors may outlive what is static.
std::mutex& lock_ = *new std::mutex;
std::vector<Memory>& memory = *new std::vector<Memory>(devices);

// The CPU memory that stands for a piece of a device's.
struct Held { Storage storage; int64_t bytes; DeviceIndex index; Cache::Block* block; };

void let_go(void* context) {
  auto* held = static_cast<Held*>(context);
  {
    std::lock_guard<std::mutex> guard(lock_);
    memory[held->index].live -= held->bytes;
    if (held->block) memory[held->index].cache.give_back(held->block);
  }
  delete held;
}

DataPtr as_device_memory(Storage storage, DeviceIndex index) {
  auto bytes = static_cast<int64_t>(storage.nbytes());
  Cache::Block* block = nullptr;
  {
    std::lock_guard<std::mutex> guard(lock_);
    Memory& m = memory[index];
    if (bytes) block = m.cache.take(bytes);
    m.live += bytes;
    m.peak = std::max(m.peak, m.live);
    m.allocations += bytes > 0;
  }
  void* data = storage.mutable_data();
  return {data, new Held{std::move(storage), bytes, index, block}, &let_go, Device(kCUDA, index)};
}

struct DeviceMemory final : public Allocator {
  DataPtr allocate(size_t bytes) override {
    Storage host(Storage::use_byte_size_t(), bytes, GetCPUAllocator()->allocate(bytes), GetCPUAllocator(), true);
    return as_device_memory(std::move(host), current);
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
DeviceMemory device_memory;
const bool allocator_is_set = [] { c10::SetAllocator(kCUDA, &device_memory, 10); return true; }();

// Page-locked memory of the host is ordinary memory whose address is remembered: copies from it need no wait.
std::map<const void*, size_t>& pinned = *new std::map<const void*, size_t>;

struct PinnedMemory final : public Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* host = new DataPtr(GetCPUAllocator()->allocate(bytes));
    std::lock_guard<std::mutex> guard(lock_);
    pinned[host->get()] = bytes;
    return {host->get(), host, &unpin, Device(kCPU)};
  }
  static void unpin(void* context) {
    auto* host = static_cast<DataPtr*>(context);
    {
      std::lock_guard<std::mutex> guard(lock_);
      pinned.erase(host->get());
    }
    delete host;
  }
  DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedMemory pinned_memory;

bool is_pinned_address(const void* data) {
  std::lock_guard<std::mutex> guard(lock_);
  auto after = pinned.upper_bound(data);
  if (after == pinned.begin()) return false;
  auto [start, bytes] = *std::prev(after);
  return data < static_cast<const char*>(start) + bytes;
}

// ---------------------------------------------------------------------------------------------------- random numbers

// A device's stream of random numbers: a CPU generator of its own, which the CPU's kernels are given in its place.
struct DeviceGenerator final : public c10::GeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index)
      : GeneratorImpl(Device(kCUDA, index), DispatchKeySet(DispatchKey::CUDA)), host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->host = host.clone();
    return copy;
  }
  Generator host;
};

Generator& default_generator(DeviceIndex index) {
  static auto& all = *new std::vector<Generator>([] {
    std::vector<Generator> made;
    for (DeviceIndex i = 0; i < devices; i++) made.push_back(make_generator<DeviceGenerator>(i));
    return made;
  }());
  return all.at(index < 0 ? current : index);
}

Generator host_generator(const Generator& of) {
  return static_cast<DeviceGenerator*>(of.unsafeGetGeneratorImpl())->host;
}

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return devices; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex i) const override { return exchange(i); }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchange(i); }
  void setCurrentDevice(DeviceIndex i) const override { exchange(i); }
  int getNumGPUs() const override { return devices; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned_address(data); }
  Device getDeviceFromPtr(void*) const override { return on(current); }
  void deviceSynchronize(DeviceIndex) const override {}
  const Generator& getDefaultGenerator(DeviceIndex i) const override { return default_generator(i); }
  Generator getNewGenerator(DeviceIndex i) const override { return make_generator<DeviceGenerator>(i < 0 ? current : i); }
};

// ---------------------------------------------------------------------------------------------------- counts and graphs

struct Tally {
  std::map<std::string, int64_t> launches, syncs;
  int64_t uploads = 0, downloads = 0;
  std::vector<std::string> trace;
};
Tally& tally = *new Tally;
int sync_debug_mode = 0;  // torch.cuda.set_sync_debug_mode: 1 warns, 2 raises

// A captured graph: what was launched, to be launched again on the same memory.
struct Graph { std::vector<std::function<void()>> nodes; };
std::map<int64_t, Graph>& graphs = *new std::map<int64_t, Graph>;
Graph* capturing = nullptr;

void launched(const std::string& name, std::function<void()> again) {
  std::lock_guard<std::mutex> guard(lock_);
  if (capturing) {
    capturing->nodes.push_back(std::move(again));
  } else {
    tally.launches[name]++;
    tally.trace.push_back(name);
  }
}

// The host waits for the device here.
void waits(const std::string& name) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", name, ")");
  TORCH_CHECK(sync_debug_mode < 2, "called a synchronizing CUDA operation (", name, ")");
  if (sync_debug_mode == 1) TORCH_WARN("called a synchronizing CUDA operation (", name, ")");
  std::lock_guard<std::mutex> guard(lock_);
  tally.syncs[name]++;
  tally.trace.push_back("wait: " + name);
}

// ---------------------------------------------------------------------------------------------------- operations

void release_alias(void* context) { delete static_cast<Storage*>(context); }

// A CPU tensor on the memory of a device's.
Tensor host_alias(const Tensor& t) {
  if (!is_here(t)) return t;
  auto* keep = new Storage(t.storage());
  DataPtr data(keep->mutable_data(), keep, &release_alias, Device(kCPU));
  Storage storage(Storage::use_byte_size_t(), keep->nbytes(), std::move(data), GetCPUAllocator(), true);
  auto alias = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), t.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return alias;
}

Tensor device_tensor(Storage storage, const Tensor& like) {
  auto t = at::detail::make_tensor<TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CUDA), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return t;
}

// The CPU's result becomes the device's, its memory with it.
Tensor to_device(const Tensor& result, DeviceIndex index) {
  if (!result.defined() || is_here(result)) return result;
  Storage host = result.storage();
  auto bytes = host.nbytes();
  Storage storage(Storage::use_byte_size_t(), bytes, as_device_memory(std::move(host), index), &device_memory, true);
  return device_tensor(std::move(storage), result);
}

// Operations that take indices from the host too; they upload them, and wait.
const std::set<std::string> takes_host_indices = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor", "aten::index_put_", "aten::index_put",
    "aten::_index_put_impl_"};
// Operations whose result's size or value the host must know.
const std::set<std::string> waiting = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::_assert_async_now"};

struct Call {
  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  std::string name;
  std::vector<IValue> args;
  DeviceIndex index = -1;         // the device that all of it is on
  bool host_tensor = false;       // a tensor of the host with a dimension
  bool masked_write = false;      // to the places of a mask, whose count is asked for
  std::vector<std::pair<Tensor, Tensor>> aliases;  // each tensor of the device, and the CPU's on its memory
  std::vector<size_t> written;                     // which of those are written to

  Call(const c10::OperatorHandle& op, std::vector<IValue> args) : op(op), schema(op.schema()), args(std::move(args)) {
    name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
    for (auto& arg : this->args) {
      if (arg.isTensor()) look(arg.toTensor());
      else if (arg.isTensorList()) for (const Tensor& t : arg.toTensorVector()) look(t);
      else if (arg.isOptionalTensorList()) for (const auto& t : arg.toOptionalTensorVector()) { if (t) look(*t); }
      else if (arg.isDevice() && arg.toDevice().type() == kCUDA) meet(on(arg.toDevice().index()).index());
    }
    masked_write = name == "aten::_index_put_impl_" && by_a_mask(this->args);
    bool mixes = index >= 0 && host_tensor && !takes_host_indices.count(name);
    TORCH_CHECK(!mixes, "Expected all tensors to be on the same device, but found at least two devices, cuda:", int(index),
                " and cpu! (", name, ")");
  }

  void meet(DeviceIndex other) {
    TORCH_CHECK(index < 0 || index == other, "Expected all tensors to be on the same device, but found at least two ",
                "devices, cuda:", int(index), " and cuda:", int(other), "! (", name, ")");
    index = other;
  }
  void look(const Tensor& t) {
    if (is_here(t)) meet(t.device().index());
    else if (t.defined() && t.device().type() == kCPU && t.dim() > 0) host_tensor = true;
  }
  // One number of the host is filled in without counting.
  static bool by_a_mask(const std::vector<IValue>& args) {
    const Tensor value = args[2].toTensor();
    if (value.numel() == 1 && !is_here(value)) return false;
    for (const auto& t : args[1].toOptionalTensorVector())
      if (t && t->defined() && (t->scalar_type() == kBool || t->scalar_type() == kByte)) return true;
    return false;
  }

  Tensor on_host(const Tensor& t, bool write) {
    if (!is_here(t)) return t;
    Tensor alias = host_alias(t);
    if (write) written.push_back(aliases.size());
    aliases.emplace_back(t, alias);
    return alias;
  }

  Generator generator_on_host(const IValue& arg) {
    if (!arg.isGenerator() || !arg.toGenerator().defined()) return host_generator(default_generator(index));
    Generator given = arg.toGenerator();
    TORCH_CHECK(given.device().type() == kCUDA, "Expected a 'cuda' device type for generator but found 'cpu' (", name, ")");
    return host_generator(given);
  }

  // The same call with every tensor, device and generator the CPU's.
  torch::jit::Stack host_arguments() {
    torch::jit::Stack stack;
    for (size_t i = 0; i < args.size(); i++) {
      const auto& formal = schema.arguments()[i];
      const IValue& arg = args[i];
      bool write = formal.alias_info() && formal.alias_info()->isWrite();
      if (arg.isTensor()) {
        stack.emplace_back(on_host(arg.toTensor(), write));
      } else if (arg.isTensorList()) {
        std::vector<Tensor> ts;
        for (const Tensor& t : arg.toTensorVector()) ts.push_back(on_host(t, write));
        stack.emplace_back(std::move(ts));
      } else if (arg.isOptionalTensorList()) {
        c10::List<std::optional<Tensor>> ts;
        for (const auto& t : arg.toOptionalTensorVector()) ts.push_back(t ? std::optional(on_host(*t, write)) : std::nullopt);
        stack.emplace_back(std::move(ts));
      } else if (arg.isDevice() && arg.toDevice().type() == kCUDA) {
        stack.emplace_back(Device(kCPU));
      } else if (formal.type()->str().rfind("Generator", 0) == 0) {
        stack.emplace_back(generator_on_host(arg));
      } else {
        stack.emplace_back(arg);
      }
    }
    return stack;
  }

  // The device's tensor that this result of the CPU's is a view of, if any.
  const Tensor* viewed(const Tensor& result) const {
    if (!result.defined() || !result.has_storage()) return nullptr;
    for (const auto& [device, alias] : aliases)
      if (alias.storage().unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl()) return &device;
    return nullptr;
  }

  Tensor result_on_device(const Tensor& result, bool& made) {
    if (const Tensor* source = viewed(result)) {
      c10::InferenceMode mode(source->is_inference());
      return device_tensor(source->storage(), result);
    }
    made |= result.defined();
    return to_device(result, index);
  }

  // The argument that a result which is written to stands for.
  IValue argument_of(const c10::AliasInfo& result) const {
    for (size_t i = 0; i < args.size(); i++) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias && alias->beforeSets() == result.beforeSets()) return args[i];
    }
    TORCH_CHECK(false, name, ": returns what it was not given");
  }
};

// An `out=` that was given another size has other memory now.
void take_over_resized(Call& call) {
  for (size_t i : call.written) {
    auto& [device, alias] = call.aliases[i];
    if (device.sizes() == alias.sizes() && device.strides() == alias.strides()) continue;
    Tensor moved = to_device(alias, call.index);
    device.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
    device.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  }
}

std::vector<Tensor> tensors_of(const torch::jit::Stack& stack) {
  std::vector<Tensor> all;
  for (const auto& value : stack) {
    if (value.isTensor()) all.push_back(value.toTensor());
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) all.push_back(t);
  }
  return all;
}

std::function<void()> to_call_again(const Call& call, torch::jit::Stack arguments, const torch::jit::Stack& results) {
  if (!capturing) return {};
  return [op = call.op, arguments, kept = tensors_of(results)] {
    torch::jit::Stack stack = arguments;
    op.callBoxed(&stack);
    auto made = tensors_of(stack);
    for (size_t i = 0; i < kept.size(); i++)
      if (kept[i].defined() && kept[i].data_ptr() != made[i].data_ptr()) kept[i].copy_(made[i]);
  };
}

// Some operations draw without being given a generator: the device's numbers are lent to the CPU's.
void call_on_host(const Call& call, torch::jit::Stack& stack) {
  bool draws = call.op.hasTag(at::Tag::nondeterministic_seeded) && !call.schema.argumentIndexWithName("generator");
  if (!draws) return call.op.callBoxed(&stack);
  Generator cpu = at::detail::getDefaultCPUGenerator(), own = host_generator(default_generator(call.index));
  auto before = cpu.get_state();
  cpu.set_state(own.get_state());
  call.op.callBoxed(&stack);
  own.set_state(cpu.get_state());
  cpu.set_state(before);
}

void on_device(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t n = op.schema().arguments().size();
  Call call(op, torch::jit::last(stack, n).vec());
  if (waiting.count(call.name) || call.masked_write) waits(call.name);
  if (call.host_tensor) waits(call.name + " by the host's indices");

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Within within(call.index);
  torch::jit::Stack inner = call.host_arguments();
  torch::jit::Stack arguments = capturing ? inner : torch::jit::Stack();
  call_on_host(call, inner);
  take_over_resized(call);
  auto again = to_call_again(call, std::move(arguments), inner);

  torch::jit::drop(stack, n);
  bool made = call.schema.returns().empty();  // something, and not only views
  for (size_t i = 0; i < call.schema.returns().size(); i++) {
    const auto* alias = call.schema.returns()[i].alias_info();
    const IValue& result = inner[i];
    if (alias && alias->isWrite()) {
      made = true;
      stack->push_back(call.argument_of(*alias));
    } else if (result.isTensor()) {
      stack->emplace_back(call.result_on_device(result.toTensor(), made));
    } else if (result.isTensorList()) {
      std::vector<Tensor> ts;
      for (const Tensor& t : result.toTensorVector()) ts.push_back(call.result_on_device(t, made));
      stack->emplace_back(std::move(ts));
    } else {
      made = true;
      stack->push_back(result);
    }
  }
  if (made) launched(call.name, std::move(again));
}

Tensor new_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  Within within(device ? device->index() : current);
  return at::detail::empty_generic(size, &device_memory, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype), format);
}

Tensor new_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  Within within(device ? device->index() : current);
  return at::detail::empty_strided_generic(size, stride, &device_memory, DispatchKeySet(DispatchKey::CUDA),
                                           dtype_or_default(dtype));
}

// A copy from or to the host waits, unless it was said not to and the host's side is page-locked. An upload from ordinary
// memory is staged by the driver, so `non_blocking` alone does for it.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  bool to = is_here(self), from = is_here(source);
  if (to != from) {
    const Tensor& host = to ? source : self;
    bool free = non_blocking && ((to && !capturing) || is_pinned_address(host.const_data_ptr()));
    if (!free) waits(to ? "upload" : "download");
    std::lock_guard<std::mutex> guard(lock_);
    (to ? tally.uploads : tally.downloads)++;
  }
  Tensor target = host_alias(self), origin = host_alias(source);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  target.copy_(origin);
  launched(to == from ? "aten::copy_" : to ? "upload" : "download", [target, origin]() mutable { target.copy_(origin); });
  return self;
}

// ---------------------------------------------------------------------------------------------------- attention

// Which of its kernels a card takes, in outline: flash without a mask in 16 bits, the memory-efficient one with a mask or
// in 32 bits where every query head has its own keys, else products with all scores in memory.
int64_t attention_kernel(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                         double dropout, bool causal, std::optional<double>, bool) {
  bool own_keys = query.size(-3) == key.size(-3), half = query.scalar_type() != kFloat;
  bool fits = query.dim() == 4 && query.size(-1) <= 256 && query.size(-1) == value.size(-1) && dropout == 0.0 &&
              query.scalar_type() != kDouble && !(causal && mask);
  if (fits && !mask && half) return static_cast<int64_t>(sdp::SDPBackend::flash_attention);
  if (fits && own_keys) return static_cast<int64_t>(sdp::SDPBackend::efficient_attention);
  return static_cast<int64_t>(sdp::SDPBackend::math);
}
const bool attention_is_set = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_kernel);
  return true;
}();

// Keys and values with a head for each query head, and their gradients back to the heads that there are.
Tensor for_each_head(const Tensor& x, const Tensor& query) {
  return x.size(1) == query.size(1) ? x : x.repeat_interleave(query.size(1) / x.size(1), 1);
}
Tensor to_own_heads(const Tensor& gradient, const Tensor& like) {
  if (gradient.size(1) == like.size(1)) return gradient;
  return gradient.unflatten(1, {like.size(1), gradient.size(1) / like.size(1)}).sum(2);
}

struct Attended { Tensor out, log_sum_exp; };

Attended attend(const char* name, const Tensor& query, const Tensor& key, const Tensor& value,
                const std::optional<Tensor>& mask, bool causal, std::optional<double> scale) {
  auto run = [q = host_alias(query), k = host_alias(key), v = host_alias(value), causal, scale,
              m = mask && mask->defined() ? std::optional(host_alias(*mask)) : std::nullopt] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return at::_scaled_dot_product_flash_attention_for_cpu(q, for_each_head(k, q), for_each_head(v, q), 0.0, causal, m, scale);
  };
  auto [out, log_sum_exp] = run();
  launched(name, [run, out, log_sum_exp]() mutable {
    auto [again, sums] = run();
    out.copy_(again);
    log_sum_exp.copy_(sums);
  });
  auto index = query.device().index();
  return {to_device(out, index), to_device(log_sum_exp, index)};
}

std::vector<Tensor> attend_back(const char* name, const Tensor& gradient, const Tensor& query, const Tensor& key,
                                const Tensor& value, const std::optional<Tensor>& mask, const Tensor& out,
                                const Tensor& log_sum_exp, bool causal, std::optional<double> scale) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  Tensor q = host_alias(query), k = host_alias(key), v = host_alias(value);
  auto m = mask && mask->defined() ? std::optional(host_alias(*mask)) : std::nullopt;
  auto [to_q, to_k, to_v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      host_alias(gradient), q, for_each_head(k, q), for_each_head(v, q), host_alias(out), host_alias(log_sum_exp), 0.0,
      causal, m, scale);
  launched(name, [name] { TORCH_CHECK(false, name, " in a captured graph is not rehearsed"); });
  auto index = query.device().index();
  return {to_device(to_q, index), to_device(to_own_heads(to_k, k), index), to_device(to_own_heads(to_v, v), index)};
}

Tensor no_random_state() { return new_empty({}, kLong, std::nullopt, on(current), std::nullopt, std::nullopt); }

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, bool, double,
    bool causal, std::optional<double> scale) {
  auto [out, sums] = attend("aten::_scaled_dot_product_efficient_attention", query, key, value, mask, causal, scale);
  return {out, sums, no_random_state(), no_random_state()};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_back(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double, std::array<bool, 4> wanted, bool causal,
    std::optional<double> scale) {
  TORCH_CHECK(!wanted[3], "a gradient for the mask is not rehearsed");
  if (!gradient.defined()) return {};
  auto to = attend_back("aten::_scaled_dot_product_efficient_attention_backward", gradient, query, key, value, mask, out,
                        sums, causal, scale);
  return {to[0], to[1], to[2], Tensor()};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> flash_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double, bool causal, bool, std::optional<double> scale) {
  auto [out, sums] = attend("aten::_scaled_dot_product_flash_attention", query, key, value, {}, causal, scale);
  return {out, sums, Tensor(), Tensor(), query.size(2), key.size(2), no_random_state(), no_random_state(), Tensor()};
}
std::tuple<Tensor, Tensor, Tensor> flash_attention_back(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
    const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double, bool causal, const Tensor&,
    const Tensor&, std::optional<double> scale) {
  if (!gradient.defined()) return {};
  auto to = attend_back("aten::_scaled_dot_product_flash_attention_backward", gradient, query, key, value, {}, out, sums,
                        causal, scale);
  return {to[0], to[1], to[2]};
}

// ---------------------------------------------------------------------------------------------------- what a CPU lacks

// A product of 16-bit factors, summed and given in 32.
Tensor& addmm_into(const Tensor& self, const Tensor& a, const Tensor& b, ScalarType type, const Scalar& beta,
                   const Scalar& alpha, Tensor& out) {
  auto run = [s = host_alias(self), x = host_alias(a), y = host_alias(b), o = host_alias(out), type, beta, alpha]() mutable {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    o.copy_(at::addmm(s.to(type), x.to(type), y.to(type), beta, alpha));
  };
  run();
  launched("aten::addmm.dtype_out", run);
  return out;
}
Tensor& mm_into(const Tensor& a, const Tensor& b, ScalarType type, Tensor& out) {
  return addmm_into(out, a, b, type, 0, 1, out);
}
Tensor addmm_as(const Tensor& self, const Tensor& a, const Tensor& b, ScalarType type, const Scalar& beta,
                const Scalar& alpha) {
  Tensor out = new_empty({a.size(0), b.size(1)}, type, std::nullopt, a.device(), std::nullopt, std::nullopt);
  return addmm_into(self, a, b, type, beta, alpha, out);
}
Tensor mm_as(const Tensor& a, const Tensor& b, ScalarType type) {
  Tensor out = new_empty({a.size(0), b.size(1)}, type, std::nullopt, a.device(), std::nullopt, std::nullopt);
  return mm_into(a, b, type, out);
}

void place(Tensor& self, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
}
Tensor& set_to_part(Tensor& self, Storage s, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides(sizes.size(), 1);
  if (stride.empty()) for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  place(self, std::move(s), offset.expect_int(), sizes, stride.empty() ? IntArrayRef(strides) : C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}
Tensor& set_to_storage(Tensor& self, Storage s) {
  auto items = static_cast<int64_t>(s.nbytes() / self.dtype().itemsize());
  place(self, std::move(s), 0, {items}, {1});
  return self;
}
Tensor& set_to_tensor(Tensor& self, const Tensor& other) {
  place(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
  return self;
}
void record_stream(Tensor&, Stream) {}

// ---------------------------------------------------------------------------------------------------- what Python asks

std::string lines(const std::map<std::string, int64_t>& counts) {
  std::ostringstream out;
  for (auto& [name, count] : counts) out << name << "\t" << count << "\n";
  return out.str();
}
std::string launches() { std::lock_guard<std::mutex> guard(lock_); return lines(tally.launches); }
std::string syncs() { std::lock_guard<std::mutex> guard(lock_); return lines(tally.syncs); }
std::string trace_lines() {
  std::lock_guard<std::mutex> guard(lock_);
  std::ostringstream out;
  for (auto& name : tally.trace) out << name << "\n";
  return out.str();
}
std::vector<int64_t> copies() { return {tally.uploads, tally.downloads}; }
void reset() { std::lock_guard<std::mutex> guard(lock_); tally = Tally(); }
std::vector<int64_t> memory_of(int64_t index) {
  std::lock_guard<std::mutex> guard(lock_);
  const Memory& m = memory.at(index);
  return {m.live, m.peak, m.allocations, m.cache.reserved, m.cache.peak, m.cache.asked};
}
void reset_peak(int64_t index) {
  std::lock_guard<std::mutex> guard(lock_);
  Memory& m = memory.at(index);
  m.peak = m.live;
  m.cache.peak = m.cache.reserved;
}
void empty_cache() {
  std::lock_guard<std::mutex> guard(lock_);
  for (auto& m : memory) m.cache.empty();
}
int64_t exchange_device(int64_t index) { return exchange(static_cast<DeviceIndex>(index)); }
std::optional<Generator> generator(int64_t index) { return default_generator(static_cast<DeviceIndex>(index)); }
void explicit_wait(std::string name) { waits(name); }

// For a kernel that Python computes on the host: its arguments there, its results back here, and that it was launched.
Tensor on_host(const Tensor& t) { return host_alias(t); }
Tensor from_host(const Tensor& t, int64_t index) { return to_device(t, static_cast<DeviceIndex>(index)); }
void python_kernel(std::string name) {
  launched(name, [name] { TORCH_CHECK(false, name, " in a captured graph is not rehearsed"); });
}
void set_sync_debug(int64_t mode) { sync_debug_mode = static_cast<int>(mode); }

void graph_begin(int64_t id) {
  TORCH_CHECK(!capturing, "CUDA error: a graph is being captured already");
  graphs[id] = Graph();
  capturing = &graphs[id];
}
void graph_end() { capturing = nullptr; }
void graph_replay(int64_t id) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::InferenceMode mode(true);
  for (auto& node : graphs.at(id).nodes) node();
  launched("graph", {});
}
void graph_reset(int64_t id) { graphs.erase(id); }
bool is_capturing() { return capturing != nullptr; }

}  // namespace

namespace at {
using ShadowHooks = Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ShadowHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_device>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", new_empty);
  m.impl("empty_strided", new_empty_strided);
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage_storage_offset", set_to_part);
  m.impl("set_.source_Storage", set_to_storage);
  m.impl("set_.source_Tensor", set_to_tensor);
  m.impl("record_stream", record_stream);
  m.impl("addmm.dtype", addmm_as);
  m.impl("addmm.dtype_out", addmm_into);
  m.impl("mm.dtype", mm_as);
  m.impl("mm.dtype_out", mm_into);
  m.impl("_scaled_dot_product_efficient_attention", efficient_attention);
  m.impl("_scaled_dot_product_efficient_attention_backward", efficient_attention_back);
  m.impl("_scaled_dot_product_flash_attention", flash_attention);
  m.impl("_scaled_dot_product_flash_attention_backward", flash_attention_back);
}
TORCH_LIBRARY(shadow, m) {
  m.def("launches() -> str", launches);
  m.def("syncs() -> str", syncs);
  m.def("trace() -> str", trace_lines);
  m.def("copies() -> int[]", copies);
  m.def("reset() -> ()", reset);
  m.def("memory(int index) -> int[]", memory_of);
  m.def("reset_peak(int index) -> ()", reset_peak);
  m.def("empty_cache() -> ()", empty_cache);
  m.def("exchange_device(int index) -> int", exchange_device);
  m.def("generator(int index) -> Generator?", generator);
  m.def("wait(str name) -> ()", explicit_wait);
  m.def("on_host(Tensor t) -> Tensor", on_host);
  m.def("from_host(Tensor t, int index) -> Tensor", from_host);
  m.def("launched(str name) -> ()", python_kernel);
  m.def("set_sync_debug(int mode) -> ()", set_sync_debug);
  m.def("graph_begin(int id) -> ()", graph_begin);
  m.def("graph_end() -> ()", graph_end);
  m.def("graph_replay(int id) -> ()", graph_replay);
  m.def("graph_reset(int id) -> ()", graph_reset);
  m.def("is_capturing() -> bool", is_capturing);
}
