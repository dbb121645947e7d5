#if os(macOS) || os(Linux)
    import Foundation

    /// A running `mm1 serve`, which ends with this process however it ends: it watches its
    /// standard input, which the kernel closes.
    ///
    /// Unchecked: `Process` is set up by one thread before it runs, and only signalled after.
    final class Child: @unchecked Sendable {
        /// What a server says of itself once it serves.
        struct Served: Decodable, Sendable {
            let url: URL
            let model: String
            let version: String
        }

        /// Nil where it ended before it served.
        let served: Task<Served?, Never>
        /// Its end.
        let exit: Task<Exit, Never>

        private let process = Process()
        // Held open: what closes it is this object's end, or this process's.
        private let stdin = Pipe()
        private let said: Task<String, Never>

        var pid: Int32 { process.processIdentifier }

        init(
            _ command: MM1Server.Command, arguments: [String], environment: [String: String],
            log: @escaping @Sendable (String) -> Void
        ) throws(MM1ServerError) {
            let (stdout, stderr) = (Pipe(), Pipe())
            process.executableURL = command.executable
            process.arguments = command.arguments + arguments
            process.environment = environment
            process.standardInput = stdin
            process.standardOutput = stdout
            process.standardError = stderr
            let (exits, ending) = AsyncStream.makeStream(of: Exit.self)
            process.terminationHandler = { process in
                let status = process.terminationStatus
                ending.yield(
                    process.terminationReason == .exit ? .status(status) : .signal(status))
                ending.finish()
            }
            do {
                try process.run()
            } catch {
                throw MM1ServerError.notLaunched(error.localizedDescription)
            }
            exit = Task {
                for await exit in exits { return exit }
                preconditionFailure("a process ended without its status")
            }
            served = Task {
                for await line in lines(of: stdout) {
                    if let served: Served = try? decode(Data(line.utf8)) { return served }
                    log(line)
                }
                return nil
            }
            said = Task {
                var last = ""
                for await line in lines(of: stderr) {
                    log(line)
                    if !line.allSatisfy(\.isWhitespace) { last = line }
                }
                return last
            }
        }

        /// The last line that it said, once it has ended.
        func lastWords() async -> String {
            // A grandchild may hold the pipe open for ever.
            let limit = Task {
                try await Task.sleep(for: .seconds(1))
                said.cancel()
            }
            defer { limit.cancel() }
            let line = await said.value
            return line.hasPrefix("error: ") ? String(line.dropFirst(7)) : line
        }

        /// Asks it to end, as Ctrl-C does: answers under way are finished.
        func terminate() {
            if process.isRunning { process.terminate() }
        }

        /// Ends it at once.
        func kill() {
            if process.isRunning { _ = signal(SIGKILL) }
        }

        private func signal(_ number: Int32) -> Int32 {
            #if canImport(Darwin)
                Darwin.kill(pid, number)
            #else
                Glibc.kill(pid, number)
            #endif
        }
    }
#endif
