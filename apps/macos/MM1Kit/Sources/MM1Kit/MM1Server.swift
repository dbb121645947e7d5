#if os(macOS) || os(Linux)
    import Foundation

    /// A model on this machine: `mm1 serve` as a child of the app.
    ///
    ///     let server = MM1Server()
    ///     let client = try await server.start()
    ///     let answer = try await client.answer([.user("Hello")])
    ///     await server.stop()
    ///
    /// It listens at 127.0.0.1 and has a random key, which only the child's environment holds.
    /// One that dies, or no longer answers, is started again at the same port and with the same
    /// key, so that a client stays good; what it was asked meanwhile fails. The child ends with
    /// ``stop()``, with the last reference to the server, and with the app, also if that crashes.
    public actor MM1Server {
        /// What the server is doing.
        public enum State: Sendable, Hashable {
            case starting
            case running(Running)
            /// It died, and is started again after a wait.
            case restarting(after: Duration, because: MM1ServerError)
            /// It was given up.
            case failed(MM1ServerError)
            case stopped
        }

        /// A server that answers.
        public struct Running: Sendable, Hashable {
            public let client: MM1Client
            public let model: String
            /// Of mm1-mlx; ``MM1Kit/version`` is the one that was tested.
            public let version: String
            public let pid: Int32
        }

        public let options: Options
        private let board = Board()
        private var work: Task<Void, Never>?

        public init(_ options: Options = Options()) {
            self.options = options
        }

        deinit {
            work?.cancel()
        }

        /// Starts it if it is not running, and waits until it answers.
        ///
        /// - Throws: ``MM1ServerError``, or `CancellationError`; the start goes on then.
        @discardableResult
        public func start() async throws -> MM1Client {
            if case .failed = board.state { work = nil }
            if work == nil {
                let command = try command()
                board.post(.starting)
                let supervisor = Supervisor(command, options, board)
                work = Task { await supervisor.run() }
            }
            return try await client()
        }

        private func command() throws(MM1ServerError) -> Command {
            if let command = options.command { return command }
            do {
                return try Command.find(environment: options.inherited)
            } catch {
                board.post(.failed(error))
                throw error
            }
        }

        /// A client of the running server; waits while it is being started again.
        ///
        /// - Throws: ``MM1ServerError``, or `CancellationError`.
        public func client() async throws -> MM1Client {
            for await state in board.states() {
                switch state {
                case .starting, .restarting: continue
                case .running(let running): return running.client
                case .failed(let error): throw error
                case .stopped: throw MM1ServerError.stopped
                }
            }
            throw CancellationError()
        }

        /// Ends it: answers under way have ``Options/grace``. It may be started again, with
        /// another key.
        public func stop() async {
            guard let work else { return }
            work.cancel()
            await work.value
            // Somebody else may have started it again meanwhile.
            if self.work == work { self.work = nil }
        }

        public nonisolated var state: State {
            board.state
        }

        /// The present state, and all later ones.
        public nonisolated var states: AsyncStream<State> {
            board.states()
        }
    }
#endif
