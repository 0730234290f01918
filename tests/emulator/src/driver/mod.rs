//! The driver's state: devices, modules, streams, events, captures and graphs.
//!
//! Work is queued per stream and runs only when somebody waits for it, so that a program which
//! forgets to wait sees stale data. Each piece of work knows what it depends on: its stream's
//! order, the legacy stream's implicit order, and events.

pub mod api;
mod config;
mod errors;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ffi::{CString, c_void};
use std::io::Write;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

pub use config::Config;

use crate::decode;
use crate::exec::{self, Launch, Machine};
use crate::fatbin;
use crate::isa::Kernel;
use crate::memory::DeviceMemory;
use crate::parse::{self, Space};
use crate::rng::Rng;

/// `CUresult` as a number.
pub type Code = u32;

/// The outcome of a call.
pub type Call<T = ()> = Result<T, Code>;

/// A handle that the program holds; never a valid pointer.
pub type Handle = usize;

/// The legacy default stream, by its second name.
const LEGACY: Handle = 1;
/// The per-thread default stream.
const PER_THREAD: Handle = 2;
const FIRST_HANDLE: Handle = 0x5057_0000_0000;

thread_local! {
    /// The current context; one word, because large thread-local data make dlopen fail.
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));

/// The process's driver. A panic in an earlier call leaves it usable: the error was reported.
fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One device with its primary context.
struct Device {
    retained: u32,
    memory: DeviceMemory,
    /// The sticky error, which only the end of the process clears.
    error: Option<Code>,
    launches: u32,
    legacy: Handle,
    per_thread: HashMap<ThreadId, Handle>,
    threshold: u64,
}

struct Module {
    device: usize,
    globals: Vec<(String, u64, u64)>,
    kernels: HashMap<String, Arc<Kernel>>,
}

struct Function {
    device: usize,
    module: Handle,
    kernel: Arc<Kernel>,
    max_dynamic: u32,
    carveout: i32,
}

/// A kernel launch with everything that it needs, copied at the call.
struct KernelWork {
    kernel: Arc<Kernel>,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    params: Vec<u8>,
}

/// Work of a stream.
#[derive(Clone)]
enum Work {
    Kernel(Arc<KernelWork>),
    /// From pageable memory, copied at the call.
    Upload(u64, Arc<Vec<u8>>),
    /// From pinned memory, read when it runs.
    UploadPinned(u64, usize, u64),
    /// To host memory.
    Download(usize, u64, u64),
    Copy(u64, u64, u64),
    /// Value bytes, repeated so many times.
    Fill(u64, [u8; 4], usize, u64),
    Free(u64),
    /// Nodes of a graph that allocate and free memory of its own.
    Begin(u64),
    End(u64),
    Record(Handle, u64),
    /// Only waits for what it depends on.
    Wait,
    Host(usize, usize),
    Graph(Arc<Vec<Node>>),
}

struct Queued {
    id: u64,
    /// (stream, work) that must have run before.
    after: Vec<(Handle, u64)>,
    work: Work,
}

struct Stream {
    device: usize,
    nonblocking: bool,
    flags: u32,
    priority: i32,
    queue: VecDeque<Queued>,
    last: u64,
    done: u64,
    capture: Option<u64>,
}

struct Event {
    device: usize,
    timing: bool,
    /// Stream and work of the last record, and how many records there were.
    record: Option<(Handle, u64)>,
    serial: u64,
    /// Serial and time of the last record that ran.
    ran: Option<(u64, Instant)>,
    /// Capture and nodes of the last record, when it was captured.
    captured: Option<(u64, Vec<usize>)>,
}

/// A node of a graph.
#[derive(Clone)]
struct Node {
    work: Work,
    after: Vec<usize>,
}

/// `CUstreamCaptureMode`.
const CAPTURE_GLOBAL: u32 = 0;
const CAPTURE_THREAD_LOCAL: u32 = 1;
const CAPTURE_RELAXED: u32 = 2;

struct Capture {
    origin: Handle,
    mode: u32,
    thread: ThreadId,
    nodes: Vec<Node>,
    /// The nodes on which the next one of each stream depends.
    tails: HashMap<Handle, Vec<usize>>,
    invalid: bool,
}

/// Everything.
pub struct State {
    config: Result<Config, String>,
    initialised: bool,
    devices: Vec<Device>,
    modules: HashMap<Handle, Module>,
    functions: HashMap<Handle, Function>,
    streams: HashMap<Handle, Stream>,
    events: HashMap<Handle, Event>,
    captures: HashMap<u64, Capture>,
    graphs: HashMap<Handle, (usize, Arc<Vec<Node>>)>,
    /// Instantiated graphs: device and nodes.
    execs: HashMap<Handle, (usize, Arc<Vec<Node>>)>,
    /// Those of them that free when they are launched what an earlier launch has left.
    auto_free: HashSet<Handle>,
    /// Memory that graphs have been launched to allocate and nobody has freed.
    left: HashSet<u64>,
    /// Pinned host memory: address to size, and whether it is ours to free.
    pinned: BTreeMap<usize, (usize, bool)>,
    next_handle: Handle,
    next_work: u64,
    rng: Rng,
    /// A module was made of `PW_EMULATOR_PTX_FROM`.
    edited: bool,
    /// Kept for the program, which may hold on to the pointer.
    last_fault: CString,
}

impl State {
    fn new() -> State {
        let config = Config::from_env();
        let seed = config.as_ref().map_or(1, |c| c.seed);
        State {
            config,
            initialised: false,
            devices: Vec::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
            auto_free: HashSet::new(),
            left: HashSet::new(),
            pinned: BTreeMap::new(),
            next_handle: FIRST_HANDLE,
            next_work: 1,
            rng: Rng::new(seed),
            edited: false,
            last_fault: CString::default(),
        }
    }

    fn handle(&mut self) -> Handle {
        self.next_handle += 16;
        self.next_handle
    }

    /// Says what is wrong on stderr, keeps it, and gives the code back.
    fn complain(&mut self, code: Code, text: &str) -> Code {
        let text = if text.starts_with("pointwise emulator") {
            text.to_string()
        } else {
            format!("pointwise emulator: error {code}: {text}")
        };
        eprintln!("{text}");
        self.last_fault = CString::new(text.replace('\0', " ")).unwrap_or_default();
        code
    }

    fn config(&self) -> Call<&Config> {
        self.config.as_ref().map_err(|_| 999)
    }

    fn init(&mut self) -> Call {
        let config = match &self.config {
            Ok(config) => config.clone(),
            Err(text) => {
                let text = text.clone();
                return Err(self.complain(999, &text));
            }
        };
        if config.init != 0 {
            return Err(config.init);
        }
        if self.initialised {
            return Ok(());
        }
        if config.devices == 0 {
            return Err(100);
        }
        if !config.checks {
            // An inherited variable must not make a test of races pass.
            eprintln!(
                "pointwise emulator: PW_EMULATOR_CHECKS=0, races and uninitialised reads are not \
                 reported"
            );
        }
        for number in 0..config.devices {
            let legacy = self.new_stream(number, false, 0, 0);
            self.devices.push(Device {
                retained: 0,
                memory: DeviceMemory::new(number, config.memory, config.gap),
                error: None,
                launches: 0,
                legacy,
                per_thread: HashMap::new(),
                threshold: 0,
            });
        }
        self.initialised = true;
        Ok(())
    }

    fn new_stream(
        &mut self,
        device: usize,
        nonblocking: bool,
        flags: u32,
        priority: i32,
    ) -> Handle {
        let handle = self.handle();
        self.streams.insert(
            handle,
            Stream {
                device,
                nonblocking,
                flags,
                priority,
                queue: VecDeque::new(),
                last: 0,
                done: 0,
                capture: None,
            },
        );
        handle
    }

    /// The device with this ordinal.
    fn device(&mut self, ordinal: i32) -> Call<usize> {
        if !self.initialised {
            return Err(3);
        }
        usize::try_from(ordinal).ok().filter(|&d| d < self.devices.len()).ok_or(101)
    }

    /// The device of the current context, unless that context has failed.
    fn current(&mut self) -> Call<usize> {
        if !self.initialised {
            return Err(3);
        }
        let device = self.context_device(CURRENT.get())?;
        match self.devices[device].error {
            Some(code) => Err(code),
            None => Ok(device),
        }
    }

    fn context(device: usize) -> Handle {
        FIRST_HANDLE - 0x1000 - device * 16
    }

    fn context_device(&self, context: Handle) -> Call<usize> {
        let device = (FIRST_HANDLE - 0x1000).checked_sub(context).ok_or(201_u32)? / 16;
        match self.devices.get(device) {
            Some(d) if d.retained > 0 && State::context(device) == context => Ok(device),
            _ => Err(201),
        }
    }

    /// The stream that a program's handle stands for.
    fn stream(&mut self, device: usize, handle: Handle) -> Call<Handle> {
        match handle {
            0 | LEGACY => Ok(self.devices[device].legacy),
            PER_THREAD => {
                let thread = std::thread::current().id();
                if let Some(&handle) = self.devices[device].per_thread.get(&thread) {
                    return Ok(handle);
                }
                let handle = self.new_stream(device, false, 0, 0);
                self.devices[device].per_thread.insert(thread, handle);
                Ok(handle)
            }
            _ if !self.streams.contains_key(&handle) => {
                Err(self.complain(400, "the stream does not exist (any more)"))
            }
            _ if self.streams[&handle].device != device => {
                Err(self.complain(400, "the stream belongs to another context"))
            }
            _ => Ok(handle),
        }
    }

    /// Queues work, or adds it to the capture of its stream.
    fn enqueue(&mut self, stream: Handle, work: Work) -> Call<u64> {
        let device = self.streams[&stream].device;
        if let Some(capture) = self.streams[&stream].capture {
            let capture = self.captures.get_mut(&capture).ok_or(901_u32)?;
            if capture.invalid {
                return Err(901);
            }
            let node = capture.nodes.len();
            let after = capture.tails.insert(stream, vec![node]).unwrap_or_default();
            capture.nodes.push(Node { work, after });
            return Ok(0);
        }
        let legacy = self.devices[device].legacy;
        let is_legacy = stream == legacy;
        if is_legacy {
            self.refuse_implicit(device)?;
        }
        let id = self.next_work;
        self.next_work += 1;
        let mut after = Vec::new();
        if is_legacy {
            // The legacy stream waits for all blocking streams, …
            let blocking = self.streams.iter().filter(|(h, s)| {
                **h != legacy && s.device == device && !s.nonblocking && s.done < s.last
            });
            after.extend(blocking.map(|(h, s)| (*h, s.last)));
            after.sort_unstable();
        } else if !self.streams[&stream].nonblocking {
            // … and they for it.
            after.push((legacy, self.streams[&legacy].last));
        }
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.queue.push_back(Queued { id, after, work });
            stream.last = id;
        }
        Ok(id)
    }

    /// Using the legacy stream while a blocking stream captures breaks that capture.
    fn refuse_implicit(&mut self, device: usize) -> Call {
        let capturing = self
            .streams
            .values()
            .find(|s| s.device == device && !s.nonblocking && s.capture.is_some())
            .and_then(|s| s.capture);
        match capturing {
            Some(capture) => Err(self.invalidate(capture, 906)),
            None => Ok(()),
        }
    }

    fn invalidate(&mut self, capture: u64, code: Code) -> Code {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.invalid = true;
        }
        code
    }

    /// Calls that could break somebody's capture are refused while one is under way.
    fn unsafe_call(&mut self) -> Call {
        let thread = std::thread::current().id();
        let hit = self.captures.iter().find(|(_, c)| match c.mode {
            CAPTURE_GLOBAL => true,
            CAPTURE_THREAD_LOCAL => c.thread == thread,
            _ => false,
        });
        match hit.map(|(&id, _)| id) {
            Some(id) => {
                self.invalidate(id, 900);
                let text =
                    "this call is not allowed while a stream captures; the capture is invalid";
                Err(self.complain(900, text))
            }
            None => Ok(()),
        }
    }

    /// Runs a stream's work up to and including `id`.
    fn run_until(&mut self, stream: Handle, id: u64) -> Call {
        loop {
            let Some(s) = self.streams.get_mut(&stream) else { return Ok(()) };
            match s.queue.front() {
                Some(front) if front.id <= id => {}
                _ => return Ok(()),
            }
            let Some(queued) = s.queue.pop_front() else { return Ok(()) };
            let device = s.device;
            for &(other, id) in &queued.after {
                self.run_until(other, id)?;
            }
            if let Some(code) = self.devices[device].error {
                return Err(code);
            }
            let result = self.execute(device, &queued.work);
            if let Some(s) = self.streams.get_mut(&stream) {
                s.done = queued.id;
            }
            if let Err((code, text)) = result {
                self.devices[device].error = Some(code);
                return Err(self.complain(code, &text));
            }
        }
    }

    fn synchronize_stream(&mut self, stream: Handle) -> Call {
        if let Some(capture) = self.streams[&stream].capture {
            self.invalidate(capture, 900);
            return Err(self.complain(900, "a capturing stream cannot be waited for"));
        }
        // Waiting for the legacy stream waits for what it waits for.
        let device = self.streams[&stream].device;
        if stream == self.devices[device].legacy {
            let blocking = self.device_streams(device, false);
            for stream in blocking {
                self.run_until(stream, u64::MAX)?;
            }
        }
        self.run_until(stream, u64::MAX)
    }

    fn device_streams(&mut self, device: usize, all: bool) -> Vec<Handle> {
        let chosen =
            self.streams.iter().filter(|(_, s)| s.device == device && (all || !s.nonblocking));
        let mut out: Vec<Handle> = chosen.map(|(h, _)| *h).collect();
        out.sort_unstable();
        self.rng.shuffle(&mut out);
        out
    }

    fn synchronize_device(&mut self, device: usize) -> Call {
        let capturing = self.streams.values().find(|s| s.device == device && s.capture.is_some());
        if let Some(capture) = capturing.and_then(|s| s.capture) {
            self.invalidate(capture, 900);
            return Err(
                self.complain(900, "a context with a capturing stream cannot be waited for")
            );
        }
        self.finish(device)
    }

    /// Runs all work of a device, as calls do that wait without being asked to: what a capture
    /// forbids them is `unsafe_call`'s matter.
    fn finish(&mut self, device: usize) -> Call {
        for stream in self.device_streams(device, true) {
            self.run_until(stream, u64::MAX)?;
        }
        Ok(())
    }

    fn execute(&mut self, device: usize, work: &Work) -> Result<(), (Code, String)> {
        let illegal = |text: String| (700, format!("a copy or fill touches {text}"));
        match work {
            Work::Kernel(launch) => self.run_kernel(device, launch),
            Work::Upload(to, bytes) => {
                self.devices[device].memory.write(*to, bytes).map_err(illegal)
            }
            Work::UploadPinned(to, from, len) => {
                let from = *from as *const u8;
                // SAFETY: the program promised that the pinned memory stays valid until the copy
                // has run, and its range was checked against the pinned allocations at the call.
                let bytes = unsafe { std::slice::from_raw_parts(from, *len as usize) };
                self.devices[device].memory.write(*to, bytes).map_err(illegal)
            }
            Work::Download(to, from, len) => {
                let bytes = self.devices[device].memory.read(*from, *len).map_err(illegal)?;
                // SAFETY: the program promised `len` writable bytes at `to` until the copy ran.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), *to as *mut u8, bytes.len());
                }
                Ok(())
            }
            Work::Copy(to, from, len) => {
                self.devices[device].memory.copy(*to, *from, *len).map_err(illegal)
            }
            Work::Fill(to, value, size, count) => {
                let bytes = value[..*size].repeat(*count as usize);
                self.devices[device].memory.write(*to, &bytes).map_err(illegal)
            }
            Work::Free(address) => {
                if self.devices[device].memory.free(*address) {
                    return Ok(());
                }
                Err((719, format!("{address:#x} is freed twice")))
            }
            Work::Begin(address) => {
                self.devices[device].memory.begin(*address);
                Ok(())
            }
            Work::End(address) => match self.devices[device].memory.end(*address) {
                true => Ok(()),
                false => Err((719, format!("a graph frees {address:#x}, which is not allocated"))),
            },
            Work::Record(event, serial) => {
                if let Some(event) = self.events.get_mut(event) {
                    event.ran = Some((*serial, Instant::now()));
                }
                Ok(())
            }
            Work::Wait => Ok(()),
            Work::Host(function, data) => {
                // SAFETY: the program gave this function to cuLaunchHostFunc.
                let function: extern "C" fn(*mut c_void) =
                    unsafe { std::mem::transmute(*function) };
                function(*data as *mut c_void);
                Ok(())
            }
            Work::Graph(nodes) => {
                // Any order that the dependencies allow.
                let mut left: Vec<usize> = (0..nodes.len()).collect();
                let mut done = vec![false; nodes.len()];
                while !left.is_empty() {
                    let ready: Vec<usize> = (0..left.len())
                        .filter(|&i| nodes[left[i]].after.iter().all(|&n| done[n]))
                        .collect();
                    let pick = ready[self.rng.below(ready.len())];
                    let node = left.remove(pick);
                    self.execute(device, &nodes[node].work)?;
                    done[node] = true;
                }
                Ok(())
            }
        }
    }

    fn run_kernel(&mut self, device: usize, work: &KernelWork) -> Result<(), (Code, String)> {
        let config = self.config.as_ref().map_err(|e| (999, e.clone()))?.clone();
        let machine = Machine {
            seed: config.seed,
            checks: config.checks,
            counters: config.report.is_some(),
            processors: config.processors(),
            watchdog: config.watchdog,
        };
        let state = &mut self.devices[device];
        state.launches += 1;
        let launch = Launch {
            kernel: &work.kernel,
            grid: work.grid,
            block: work.block,
            dynamic_shared: work.dynamic_shared,
            params: &work.params,
            number: state.launches,
        };
        let counters =
            exec::run(&launch, &mut state.memory, machine).map_err(|f| (f.code, f.text))?;
        if let Some(path) = &config.report {
            let shared = work.kernel.static_shared + work.dynamic_shared;
            let line = counters.line(&work.kernel.name, work.grid, work.block, shared);
            let written = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .and_then(|mut file| file.write_all(line.as_bytes()));
            written.map_err(|e| (999, format!("cannot write PW_EMULATOR_REPORT={path}: {e}")))?;
        }
        Ok(())
    }

    /// Refuses to run kernels while there is an edited copy that no module was made of: whoever edits
    /// one takes what runs for its doing.
    fn check_edited(&mut self) -> Call {
        let path = match &self.config()?.ptx_from {
            Some(path) if !self.edited => path.clone(),
            _ => return Ok(()),
        };
        let text = edited(&path).map_or_else(
            |error| error,
            |edited| {
                let names: Vec<_> = kernels(&edited).collect();
                format!(
                    "PW_EMULATOR_PTX_FROM={path} is no copy of a loaded module: none has the \
                     kernels [{}] and no others, in this order",
                    names.join(", ")
                )
            },
        );
        Err(self.complain(999, &text))
    }

    fn load_module(&mut self, device: usize, image: &[u8]) -> Call<Handle> {
        let config = self.config()?.clone();
        let text = match fatbin::choose(image, config.arch) {
            Ok(text) => text,
            Err(e) => return Err(self.complain(e.code, &e.text)),
        };
        if let Some(path) = &config.ptx_to
            && let Err(e) = std::fs::write(path, &text)
        {
            return Err(self.complain(999, &format!("cannot write PW_EMULATOR_PTX_TO={path}: {e}")));
        }
        let text = match &config.ptx_from {
            None => text,
            Some(path) => match edited(path) {
                Ok(edited) if kernels(&edited).eq(kernels(&text)) => {
                    self.edited = true;
                    edited
                }
                Ok(_) => text,
                Err(e) => return Err(self.complain(999, &e)),
            },
        };
        let text: Arc<str> = text.into();
        let module = match parse::parse(&text) {
            Ok(module) => module,
            Err(e) => return Err(self.complain(218, &e)),
        };
        if module.version > config.ptx_version() {
            let text = format!(
                "the PTX has version {}.{}, a driver for CUDA {}.{} knows {}.{}",
                module.version / 10,
                module.version % 10,
                config.driver / 1000,
                config.driver % 1000 / 10,
                config.ptx_version() / 10,
                config.ptx_version() % 10
            );
            return Err(self.complain(222, &text));
        }
        let mut globals: Vec<(String, u64, u64)> = Vec::new();
        for var in &module.vars {
            if !matches!(var.space, Space::Global | Space::Const) {
                continue;
            }
            let what = format!("variable '{}'", var.name);
            let Some(at) = self.devices[device].memory.allocate(var.size, what) else {
                return Err(2);
            };
            globals.push((var.name.to_string(), at, var.size));
        }
        let address = |name: &str| globals.iter().find(|g| g.0 == name).map(|g| g.1);
        for var in &module.vars {
            let Some(at) = address(var.name) else { continue };
            let mut bytes = var.init.clone();
            bytes.resize(var.size as usize, 0);
            for (offset, name, addend) in &var.relocations {
                let Some(target) = address(name) else {
                    let text = format!("'{}' is initialised with unknown '{name}'", var.name);
                    return Err(self.complain(218, &text));
                };
                let value = target.wrapping_add(*addend as u64).to_le_bytes();
                bytes[*offset..*offset + 8].copy_from_slice(&value);
            }
            let written = self.devices[device].memory.write(at, &bytes);
            written.map_err(|e| self.complain(999, &e))?;
        }
        let mut kernels = HashMap::new();
        for function in module.functions.iter().filter(|f| f.entry) {
            match decode::link(config.arch, &text, &module, function, &address) {
                Ok(kernel) => {
                    kernels.insert(function.name.to_string(), Arc::new(kernel));
                }
                Err(e) => {
                    let text = format!("in kernel '{}': {e}", function.name);
                    return Err(self.complain(218, &text));
                }
            }
        }
        let handle = self.handle();
        self.modules.insert(handle, Module { device, globals, kernels });
        Ok(handle)
    }
}

/// The text of `PW_EMULATOR_PTX_FROM`, or why there is none.
fn edited(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path)
        .map_err(|e| format!("cannot read PW_EMULATOR_PTX_FROM={path}: {e}"))
}

/// The names of a module's kernels.
fn kernels(ptx: &str) -> impl Iterator<Item = &str> {
    let entries = ptx.lines().filter_map(|line| line.trim_start().strip_prefix(".visible .entry"));
    entries.map(|entry| entry.split('(').next().unwrap_or(entry).trim())
}
